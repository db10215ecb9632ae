"""The pages, tables and pictures of a campaign."""
