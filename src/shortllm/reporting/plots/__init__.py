"""The plots of the report, a file per kind; drawing.py is what they share."""
