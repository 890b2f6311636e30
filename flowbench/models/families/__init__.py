"""One file per family of pipelines; the plane is one of them."""
