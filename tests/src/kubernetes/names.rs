//! What things in the cluster are called.

/// The nodes.
pub(super) const NODES: [&str; 2] = ["node-1", "node-2"];

/// The namespace of the chart.
pub(super) const NAMESPACE: &str = "volnode";
