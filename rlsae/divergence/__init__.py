"""Stage `divergence`: how far each layer moved in a tuning, by several measures, and which layers a study looks into."""
