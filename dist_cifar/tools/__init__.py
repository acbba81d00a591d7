"""Programs around a training, which never imports them."""
