"""runtime/ort."""
