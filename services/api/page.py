"""The page at `/`: what this service is and where to go on. Static, and it loads nothing from elsewhere."""

from __future__ import annotations

from string import Template

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>weight-averaging</title>
<style>
  body { font: 16px/1.6 system-ui, sans-serif; max-width: 42rem; margin: 10vh auto; padding: 0 1.5rem; }
  h1 { font-size: 1.5rem; margin-bottom: 0; }
  p.version { margin-top: 0; opacity: .65; }
  code { font: .9em ui-monospace, monospace; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; }
  dd { margin: 0; opacity: .8; }
</style>
</head>
<body>
<main>
<h1>weight-averaging</h1>
<p class="version">version $version</p>
<p>Averaged weights (SWA, EMA) for every training run, folded outside the training job.</p>
<dl>
  <dt><a href="/openapi.json">/openapi.json</a></dt><dd>every route of the REST API</dd>
  <dt><a href="/readyz">/readyz</a></dt><dd>whether the object store is there and can be trusted</dd>
  <dt><a href="/metrics">/metrics</a></dt><dd>Prometheus metrics of this process</dd>
</dl>
<p>On the command line: <code>wa submit services.recipes.digits:Digits --follow</code></p>
</main>
</body>
</html>
""")


def index_page(version: str) -> str:
    """The page, with the service's version."""
    return _PAGE.substitute(version=version)
