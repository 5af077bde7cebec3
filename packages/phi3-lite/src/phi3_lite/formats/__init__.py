"""Published formats, in and out; the model itself knows none of them."""
