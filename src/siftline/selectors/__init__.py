"""Pure selection: narrow tables and a frozen configuration in, a Selection out."""
