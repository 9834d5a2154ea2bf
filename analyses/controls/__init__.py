"""What a statement has to beat: views with nothing in them to find, and the same measure in other bases."""
