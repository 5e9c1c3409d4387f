"""What one looks at: figures, tables, the prediction browser, the form."""
