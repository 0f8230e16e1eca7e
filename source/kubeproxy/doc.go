// Package kubeproxy reads the configuration of a kube-proxy: a
// KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) as a cluster has it in
// the ConfigMap kube-system/kube-proxy or in a file.
//
// [Fields] is every field of that API: what is done with it here, or what takes
// its place. Reading goes by that list, the documentation's table is made of it,
// and a test walks the API's own types so that none is forgotten. Read gives plain
// [Settings], a note for each field that is set and has no effect here, and a
// [model.Problem] for each that cannot be understood: an unknown field or a bad
// value does not keep the rest from being used.
//
// [Set] changes one field of such a text and no other byte of it, for `millrace tune`.
//
// It reads text that it is given and nothing else, changes nothing and keeps
// nothing in the kernel. It costs about a millisecond when an agent starts; the
// API's module is needed by its tests only and is no part of the program.
package kubeproxy
