//! What of the conformance tests others need that run ordinary runtimes: a host fit for them.

pub mod host;
