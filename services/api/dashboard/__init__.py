"""The web page: what averaging did for each run, drawn on the server and kept up to date by htmx and charts."""
