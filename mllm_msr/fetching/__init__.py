"""Download of item images from untrusted web servers, with a cache in the state directory."""
