"""What training reads: pictures, captions and masks of any origin."""
