"""Pages, plots and tables made from run directories."""
