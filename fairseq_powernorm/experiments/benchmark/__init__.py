"""What measurements of speed are compared with."""
