"""Arrays in, arrays out; each kernel beside its plain reference."""
