"""What is served: bundles, the gate that a challenger passes, and the registry that names the champion."""
