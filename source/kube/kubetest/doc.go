// Package kubetest is an API server for tests: list and watch of Services,
// EndpointSlices, Nodes, Pods, ConfigMaps and Deployments, in protobuf or JSON, with selectors, pages,
// bookmarks, and the faults that a source has to survive; and get of ConfigMaps.
//
// It keeps objects in memory and is no part of the product: only tests import it.
// It writes nothing in the kernel. What it does not have of a real API server:
// admission, validation, other verbs, and TLS unless the listener brings it.
package kubetest
