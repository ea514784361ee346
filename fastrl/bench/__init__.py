"""What each technique is worth on a user's own model, lengths and machine: `fastrl bench`."""
