"""The demo page: one prompt, several models side by side.

models.py      which models, opened once     embedded.py    the embedded ones, made on first use
generating.py  text as it comes, limits      charts.py      bars of the last runs
markup.py      what a panel shows, as HTML    page.py        the page and what its buttons do
serving.py     on which address, and what the server refuses

shortllm demo --original MODEL --depth SHORT
"""
