"""Images from a bundle: sessions behind diffusers' own pipelines and schedulers."""
