"""What our code is compared with: one small file a peer."""
