"""What keeps a store right: recalibrate, diff, import, fit again, clean, doctor."""
