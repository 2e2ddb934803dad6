"""Charts and pages: one Vega-Lite specification each, drawn as PNG and in self-contained HTML."""
