"""Ways of training side by side: which models, counted or measured, in tables and pictures."""
