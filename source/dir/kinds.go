package dir

import (
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// kind is a kind of object that is read.
type kind struct {
	apiVersion string
	make       func() runtime.Object
	// former are versions that old manifests still name and no API server serves.
	former []string
}

var formerApps = []string{"extensions/v1beta1", "apps/v1beta1", "apps/v1beta2"}

// kinds are those that are read. A Scheme would hold the 150 types of their
// groups for the sake of these.
var kinds = map[string]kind{
	"Namespace":     {"v1", func() runtime.Object { return new(corev1.Namespace) }, nil},
	"Node":          {"v1", func() runtime.Object { return new(corev1.Node) }, nil},
	"Pod":           {"v1", func() runtime.Object { return new(corev1.Pod) }, nil},
	"Service":       {"v1", func() runtime.Object { return new(corev1.Service) }, nil},
	"EndpointSlice": {"discovery.k8s.io/v1", func() runtime.Object { return new(discoveryv1.EndpointSlice) }, []string{"discovery.k8s.io/v1beta1", "discovery.k8s.io/v1alpha1"}},
	"Deployment":    {"apps/v1", func() runtime.Object { return new(appsv1.Deployment) }, formerApps},
	"StatefulSet":   {"apps/v1", func() runtime.Object { return new(appsv1.StatefulSet) }, formerApps},
	"DaemonSet":     {"apps/v1", func() runtime.Object { return new(appsv1.DaemonSet) }, formerApps},
	"ReplicaSet":    {"apps/v1", func() runtime.Object { return new(appsv1.ReplicaSet) }, formerApps},
	"Job":           {"batch/v1", func() runtime.Object { return new(batchv1.Job) }, nil},
	"ConfigMap":     {"v1", func() runtime.Object { return new(corev1.ConfigMap) }, nil},
}

func (k kind) formerly(apiVersion string) bool { return slices.Contains(k.former, apiVersion) }
