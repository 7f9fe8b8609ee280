"""What people start: a program a file, its flags and one call. `mla NAME` and, in a checkout, NAME.py run them."""
