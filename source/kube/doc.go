// Package kube asks the Kubernetes API for the wishes of a cluster and follows
// their changes.
package kube
