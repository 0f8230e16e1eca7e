package cluster

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/millrace/millrace/model"
)

// Key identifies an object in a cluster. Objects without a namespace (Node,
// Namespace) have an empty one.
type Key struct {
	Kind string
	model.Name
}

// String is "Service shop/cart", "Node worker-1" or, without a name, "Service".
func (k Key) String() string {
	switch {
	case k.Name.Name == "":
		return k.Kind
	case k.Namespace == "":
		return k.Kind + " " + k.Name.Name
	}
	return k.Kind + " " + k.Name.String()
}

// Compare orders keys by namespace, name and kind.
func (k Key) Compare(o Key) int {
	return cmp.Or(k.Name.Compare(o.Name), strings.Compare(k.Kind, o.Kind))
}

// Place says where a field of an object was written, as a person looks it up:
// "shop.yaml:14". The empty field is the object itself. Read does not keep it.
type Place func(field string) string

// At is the Place of an object whose fields have no places of their own.
func At(where string) Place { return func(string) string { return where } }

// Object is one Kubernetes object, checked and in plain values. It shares no
// memory that somebody may still write with what it was read from.
type Object struct {
	Key
	// Where is the place the object came from.
	Where string
	// Problems are the object's own faults and oddities.
	Problems []model.Problem

	// value is a *model.Service without endpoints, *slice, *model.Pod,
	// *model.Node or *model.Workload, or nil where nothing is to be kept.
	value any
	// faulty says that a part of the object cannot be used.
	faulty bool
	named  bool
	born   time.Time
}

// Named says whether the object has a usable name. One that has none cannot be
// told from others and is nothing to Put.
func (o *Object) Named() bool { return o.named }

// older orders objects by who may keep an address that both claim.
func (o *Object) older(p *Object) int {
	return cmp.Or(o.born.Compare(p.born), o.Key.Compare(p.Key))
}

// clusterWide are the kinds whose objects are in no namespace.
var clusterWide = map[string]bool{"Node": true, "Namespace": true}

// KeyOf is the key of an object of a kind. An object that names no namespace is
// in "default", except for those that are in none.
func KeyOf(kind, namespace, name string) Key {
	switch {
	case clusterWide[kind]:
		namespace = ""
	case namespace == "":
		namespace = metav1.NamespaceDefault
	}
	return Key{kind, model.Name{Namespace: namespace, Name: name}}
}

// Read checks obj, which is a pointer to one of the ten types named in Kind, and
// turns it into plain values. It returns an error for another type; whatever is
// wrong inside obj is in Object.Problems.
func Read(place Place, obj runtime.Object) (*Object, error) {
	kind := Kind(obj)
	if kind == "" {
		return nil, fmt.Errorf("read %T: this kind is not read", obj)
	}
	meta := obj.(metav1.Object)
	r := &reader{place: place, object: &Object{
		Key:   KeyOf(kind, meta.GetNamespace(), meta.GetName()),
		Where: place(""),
		born:  meta.GetCreationTimestamp().Time,
	}}
	if r.object.named = r.nameable(); r.object.named {
		r.object.value = r.value(obj)
	}
	return r.object, nil
}

// Kind is the kind of an object that this package reads, "" for any other.
func Kind(obj runtime.Object) string {
	switch obj.(type) {
	case *corev1.Namespace:
		return "Namespace"
	case *corev1.Service:
		return "Service"
	case *discoveryv1.EndpointSlice:
		return "EndpointSlice"
	case *corev1.Pod:
		return "Pod"
	case *corev1.Node:
		return "Node"
	case *appsv1.Deployment:
		return "Deployment"
	case *appsv1.StatefulSet:
		return "StatefulSet"
	case *appsv1.DaemonSet:
		return "DaemonSet"
	case *appsv1.ReplicaSet:
		return "ReplicaSet"
	case *batchv1.Job:
		return "Job"
	}
	return ""
}

// reader reads one object.
type reader struct {
	place  Place
	object *Object
}

// value is nil for an object of which nothing is kept, never a typed nil.
func (r *reader) value(obj runtime.Object) any {
	switch obj := obj.(type) {
	case *corev1.Service:
		return r.service(obj)
	case *discoveryv1.EndpointSlice:
		if s := r.slice(obj); s != nil {
			return s
		}
	case *corev1.Pod:
		if p := r.pod(obj); p != nil {
			return p
		}
	case *corev1.Node:
		return r.node(obj)
	default:
		if w := r.workload(obj); w != nil {
			return w
		}
	}
	return nil
}

// fault reports a part of the object that cannot be used.
func (r *reader) fault(field, format string, args ...any) {
	r.object.faulty = true
	r.advise(field, format, args...)
}

// advise reports something that is likely a mistake but can be used.
func (r *reader) advise(field, format string, args ...any) {
	r.object.Problems = append(r.object.Problems, model.Problem{
		Where: r.place(field), Object: r.object.Key.String(), Field: field, Text: fmt.Sprintf(format, args...),
	})
}

// nameable checks the object's names; without them nothing can refer to it. Names
// end up in file and cgroup names, so that nothing else may be let through.
func (r *reader) nameable() bool {
	k := r.object.Key
	if k.Name.Name == "" {
		r.fault("metadata.name", "the object has no name: add one")
		return false
	}
	if validation.IsDNS1123Subdomain(k.Name.Name) != nil {
		r.fault("metadata.name", "%q is not a name: use at most 253 lower-case letters, digits, - and ., with a letter or digit at both ends", clip(k.Name.Name))
		return false
	}
	if k.Namespace != "" && validation.IsDNS1123Label(k.Namespace) != nil {
		r.fault("metadata.namespace", "%q is not a namespace: use at most 63 lower-case letters, digits and -, with a letter or digit at both ends", clip(k.Namespace))
		return false
	}
	return true
}

// address reads an IP address that packets can be sent to.
func (r *reader) address(field, s string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		r.fault(field, "%q is not an IP address: write one such as 10.0.0.1 or fd00::1, without leading zeros", clip(s))
	case addr.Zone() != "":
		r.fault(field, "%s names a network interface, which no other machine has: leave out %%%s", clip(s), clip(addr.Zone()))
	case addr.Is4In6():
		r.fault(field, "%s is an IPv4 address in IPv6 form: write %s", s, addr.Unmap())
	case addr.IsUnspecified() || addr.IsLoopback() || addr.IsLinkLocalUnicast() || addr.IsMulticast():
		r.fault(field, "%s does not reach another machine: use an ordinary address", s)
	default:
		return addr, true
	}
	return netip.Addr{}, false
}

// port reads a port number.
func (r *reader) port(field string, n int32) (uint16, bool) {
	if n < 1 || n > 65535 {
		r.fault(field, "port %d is out of range: use 1 to 65535", n)
		return 0, false
	}
	return uint16(n), true
}

func (r *reader) protocol(field string, s string) (model.Protocol, bool) {
	p, err := model.ParseProtocol(clip(s))
	if err != nil {
		r.fault(field, "%v", err)
	}
	return p, err == nil
}

// clip shortens what was read so that a message stays one line.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

// annotations copies all but the record that kubectl keeps of the whole object,
// which is by far the largest and tells nothing new.
func annotations(from map[string]string) map[string]string {
	to := maps.Clone(from)
	delete(to, corev1.LastAppliedConfigAnnotation)
	if len(to) == 0 {
		return nil
	}
	return to
}

// copied copies labels; none are nil.
func copied(from map[string]string) map[string]string {
	if len(from) == 0 {
		return nil
	}
	return maps.Clone(from)
}
