package cluster

import (
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// kind is the kind of an object that this package reads, in one byte.
type kind uint8

const (
	kindNone kind = iota
	kindNamespace
	kindService
	kindEndpointSlice
	kindPod
	kindNode
	kindDeployment
	kindStatefulSet
	kindDaemonSet
	kindReplicaSet
	kindJob
	kindConfigMap
)

var kindNames = [...]string{
	kindNone:          "",
	kindNamespace:     "Namespace",
	kindService:       "Service",
	kindEndpointSlice: "EndpointSlice",
	kindPod:           "Pod",
	kindNode:          "Node",
	kindDeployment:    "Deployment",
	kindStatefulSet:   "StatefulSet",
	kindDaemonSet:     "DaemonSet",
	kindReplicaSet:    "ReplicaSet",
	kindJob:           "Job",
	kindConfigMap:     "ConfigMap",
}

// String is the kind as manifests have it.
func (k kind) String() string { return kindNames[k] }

// Kind is the kind of an object that this package reads, "" for any other.
func Kind(obj runtime.Object) string { return kindOf(obj).String() }

func kindOf(obj runtime.Object) kind {
	switch obj.(type) {
	case *corev1.Namespace:
		return kindNamespace
	case *corev1.Service:
		return kindService
	case *discoveryv1.EndpointSlice:
		return kindEndpointSlice
	case *corev1.Pod:
		return kindPod
	case *corev1.Node:
		return kindNode
	case *appsv1.Deployment:
		return kindDeployment
	case *appsv1.StatefulSet:
		return kindStatefulSet
	case *appsv1.DaemonSet:
		return kindDaemonSet
	case *appsv1.ReplicaSet:
		return kindReplicaSet
	case *batchv1.Job:
		return kindJob
	case *corev1.ConfigMap:
		return kindConfigMap
	}
	return kindNone
}
