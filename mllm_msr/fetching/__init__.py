"""Downloads images from the web and fills the table of images."""
