"""What experiments need and no idea does. Nothing in here is needed to understand a paper."""
