"""From records to device: rendering to token ids, the packing plan, the loader."""
