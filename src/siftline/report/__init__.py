"""What people look at: the page of a run, pictures, the state of a root, the story of a row."""
