"""Reports: HTML pages and README tables made from stored results."""
