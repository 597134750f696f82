"""What runs give, told: metrics files, their summaries, and the report of a spiking network with its figures."""
