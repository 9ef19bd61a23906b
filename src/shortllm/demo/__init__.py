"""The demo page: one prompt, several models side by side.

models.py    the models of the page, and the embedded ones, shortened on first use
generate.py  text while it is generated, what that took, and limits
page.py      the page, and its server

shortllm demo --original MODEL --depth SHORT
"""
