"""exporters/ort."""
