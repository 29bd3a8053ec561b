"""What connects other libraries with ours; each module needs the library in its name."""
