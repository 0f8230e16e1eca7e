package cluster

import (
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// TestUnread puts one object after others into a process that has seen nothing,
// and into one that saw the object when nothing was wrong with it.
func TestUnread(t *testing.T) {
	owned := []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "r", Controller: new(true)}}
	for _, test := range []struct {
		about   string
		others  []runtime.Object
		object  runtime.Object
		another runtime.Object // the same object without a fault
		unread  int
	}{
		{"a faultless Service", nil, service("a", "10.0.0.1", 80), service("a", "", 80), 0},
		{"port 0", nil, service("a", "10.0.0.1", 80, 0), service("a", "", 80), 1},
		{"three faults in one object", nil, service("a", "10.0.0.300", 0, 70000), service("a", "", 80), 1},
		{"a port that is there twice", nil, service("a", "", 80, 80), service("a", "", 80), 1},
		{"one unnamed port of two", nil, change(service("a", "", 80, 81), func(s *corev1.Service) { s.Spec.Ports[0].Name = "" }), service("a", "", 80), 1},
		{"an unknown type", nil, change(service("a", "", 80), func(s *corev1.Service) { s.Spec.Type = "clusterip" }), service("a", "", 80), 1},
		{"an impossible selector", nil, change(service("a", "", 80), func(s *corev1.Service) { s.Spec.Selector = map[string]string{"a b": "c"} }), service("a", "", 80), 1},
		{"no ports, which is odd but can be used", nil, service("a", ""), service("a", "", 80), 0},
		{"an address of an older Service", []runtime.Object{service("0", "10.0.0.1", 80)}, service("a", "10.0.0.1", 80), service("a", "", 80), 0},
		{"a node port out of range", nil, onNodes(service("a", "10.0.0.1", 80), 70000), service("a", "", 80), 1},
		{"a node port of an older Service", []runtime.Object{onNodes(service("0", "", 80), 30080)}, onNodes(service("a", "10.0.0.1", 80), 30080), service("a", "", 80), 0},
		{"an external address that is none", nil, change(service("a", "", 80), func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"127.0.0.1"} }), service("a", "", 80), 1},
		{"an unknown policy", nil, change(service("a", "", 80), func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "Near" }), service("a", "", 80), 1},
		{"a port of SCTP, which is not served", nil, change(service("a", "", 80), func(s *corev1.Service) { s.Spec.Ports[0].Protocol = "SCTP" }), service("a", "", 80), 0},
		{"a Service of another proxy", nil, change(service("a", "x", 0), func(s *corev1.Service) { s.Labels = map[string]string{serviceProxyName: "x"} }), service("a", "", 80), 0},
		{"a range with bits behind its mask", nil, node("n", "10.1.0.1/16"), node("n", "10.1.0.0/16"), 0},
		{"a slice with an address that is none", nil, slice80("s", "a", "10.1.0.256"), slice80("s", "a"), 1},
		{"a slice of an unknown family", nil, change(slice80("s", "a"), func(s *discoveryv1.EndpointSlice) { s.AddressType = "IPX" }), slice80("s", "a"), 1},
		{"a slice without a Service", nil, slice80("s", ""), slice80("s", "a"), 1},
		{"a slice of host names, which is passed over", nil, change(slice80("s", "a"), func(s *discoveryv1.EndpointSlice) { s.AddressType = "FQDN" }), slice80("s", "a"), 0},
		{"a slice whose Service has yet to come", nil, slice80("s", "later", "10.1.0.1"), slice80("s", "a"), 0},
		{"a pod with an address that is none", nil, pod("p", "10.1.0"), pod("p", "10.1.0.1"), 1},
		{"an owned pod with an address that is none", nil, change(pod("p", "10.1.0"), func(p *corev1.Pod) { p.OwnerReferences = owned }), pod("p", "10.1.0.1"), 1},
		{"an address of another pod", []runtime.Object{pod("0", "10.1.0.1")}, pod("p", "10.1.0.1"), pod("p", "10.1.0.2"), 0},
		{"a pod that has ended", nil, change(pod("p", "10.1.0"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), pod("p", "10.1.0.1"), 0},
		{"a range that is none", nil, node("n", "10.1.0.0"), node("n", "10.1.0.0/16"), 1},
		{"a range that overlaps one of the same Node", nil, node("n", "10.1.0.0/16", "10.1.2.0/24"), node("n"), 1},
		{"a range that overlaps an older Node's", []runtime.Object{node("0", "10.0.0.0/8")}, node("n", "10.1.0.0/16"), node("n"), 0},
		{"less than no pods", nil, deployment(-1), deployment(1), 1},
		{"a selector that does not match its template", nil, change(deployment(1), func(d *appsv1.Deployment) {
			d.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}
		}), deployment(1), 0},
	} {
		t.Run(test.about, func(t *testing.T) {
			c, k := New(), KeyOf(Kind(test.object), "", test.object.(metav1.Object).GetName())
			unread := func(when string, n int) {
				t.Helper()
				if s := c.Snapshot(); s.Unread != n {
					t.Errorf("%s %d are unread instead of %d: %v", when, s.Unread, n, s.Problems)
				}
			}
			set(t, c, test.others...)
			set(t, c, test.object)
			unread("at first", test.unread)
			set(t, c, test.object)
			unread("put twice", test.unread)
			set(t, c, test.another)
			unread("mended", 0)
			set(t, c, test.object)
			unread("broken again", 0)
			c.Delete(k)
			unread("deleted", 0)
			set(t, c, test.object)
			unread("new again", test.unread)
			c.Delete(k)
			unread("deleted again", 0)
		})
	}
}

// onNodes is a Service with a node port.
func onNodes(s *corev1.Service, port int32) *corev1.Service {
	s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, port
	return s
}

// change is obj after f.
func change[T runtime.Object](obj T, f func(T)) T {
	f(obj)
	return obj
}

func deployment(replicas int32) *appsv1.Deployment {
	return &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "d"}, Spec: appsv1.DeploymentSpec{Replicas: &replicas}}
}
