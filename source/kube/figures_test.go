package kube

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/millrace/millrace/model"
)

// about is what the API server and controllers write beside what is read.
func about(name string, labels map[string]string) metav1.ObjectMeta {
	fields := metav1.NewFieldsV1(strings.Repeat(`{"f:metadata":{"f:labels":{".":{},"f:app":{}}},"f:spec":{"f:ports":{}}}`, 8))
	return metav1.ObjectMeta{
		Name: name, Namespace: "shop", Labels: labels, UID: "0b2b6a33-2a9c-4d52-8f4e-5f3d8a0c7f11",
		Annotations:   map[string]string{"kubectl.kubernetes.io/last-applied-configuration": strings.Repeat(`{"spec":"x"}`, 40)},
		ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kube-controller-manager", Operation: "Update", APIVersion: "v1", FieldsType: "FieldsV1", FieldsV1: fields}},
	}
}

func largeService(i int) *corev1.Service {
	ip := fmt.Sprintf("10.%d.%d.%d", 100+i>>16, i>>8&255, i&255)
	name := fmt.Sprintf("shop-%05d", i)
	return &corev1.Service{
		ObjectMeta: about(name, map[string]string{"app": name}),
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Selector: map[string]string{"app": name},
			Ports:    []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}
}

// largeSlice has four endpoints; the last one's address depends on turn.
func largeSlice(i, turn int) *discoveryv1.EndpointSlice {
	name := fmt.Sprintf("shop-%05d", i)
	port, protocol, portName, yes, no := int32(8080), corev1.ProtocolTCP, "http", true, false
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  about(name+"-x7x2q", map[string]string{discoveryv1.LabelServiceName: name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io"}),
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port, Protocol: &protocol}},
	}
	for e := range 4 {
		node, zone := fmt.Sprintf("worker-%d", (i+e)%100), fmt.Sprintf("zone-%d", e%3)
		address := fmt.Sprintf("10.%d.%d.%d", 10+e, i>>8&255, i&255)
		if e == 3 {
			address = fmt.Sprintf("10.%d.%d.%d", 20+turn, i>>8&255, i&255)
		}
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{address}, NodeName: &node, Zone: &zone,
			Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: fmt.Sprintf("%s-6d4cf56db6-%04d", name, e)},
		})
	}
	return s
}

// heap is what is live, in bytes.
func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// The figures of 10,000 Services with four endpoints each are printed, not
// judged: they belong to a machine. The memory is judged; it belongs to the code.
func TestFiguresOfTenThousandServices(t *testing.T) {
	const services, changes = 10_000, 200
	b := newBed(t)
	for i := range services {
		b.Put(largeService(i), largeSlice(i, 0))
	}
	b.Compact()
	before, allocatedBefore := heap(), allocated()
	begun := time.Now()
	b.run()
	first := b.until("all are there", func(s *model.Snapshot) bool { return s.Complete })
	took := time.Since(begun)
	if n := len(first.Services); n != services+1 {
		t.Fatalf("%d Services", n)
	}
	if selector := first.Services[0].Selector; selector != nil {
		t.Errorf("a selector is kept, and nobody reads it: %v", selector)
	}
	spent := allocated() - allocatedBefore
	live := heap() - before
	t.Logf("%d Services x 4: first Snapshot after %v; %.1f MB live (%.2f kB for each), %.0f MB allocated to get there",
		services, took.Round(time.Millisecond), float64(live)/1e6, float64(live)/services/1e3, float64(spent)/1e6)
	if most := uint64(services * 1450); live > most {
		t.Errorf("%d bytes live for %d Services x 4, want at most %d", live, services, most)
	}
	b.watched()
	var seen, delivered []time.Duration
	for turn := range changes {
		object := largeSlice((turn*7919)%services, turn+1)
		number := len(b.snapshots())
		at := time.Now()
		b.Put(object)
		wait(t, "it is delivered", func() bool { return len(b.snapshots()) > number })
		b.mu.Lock()
		seen = append(seen, b.delivered[number].Seen.Sub(at))
		delivered = append(delivered, b.at[number].Sub(at))
		b.mu.Unlock()
	}
	slices.Sort(seen)
	slices.Sort(delivered)
	t.Logf("a changed endpoint, from the API server's write: noticed p50 %v p99 %v, delivered p50 %v p99 %v",
		seen[changes/2], seen[changes*99/100], delivered[changes/2], delivered[changes*99/100])
}
