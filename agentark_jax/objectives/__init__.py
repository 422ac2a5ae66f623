"""Pure losses on arrays and parameter trees; they know no files."""
