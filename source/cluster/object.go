package cluster

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/corefile"
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

// Object is one Kubernetes object, checked and in plain values. It shares no
// memory that somebody may still write with what it was read from. A large
// cluster is a hundred thousand of them, so that each byte here counts.
type Object struct {
	name model.Name
	// value is a *model.Service, *slice, *model.Pod, *model.Node, *model.Workload,
	// *dnsServers, *corefile.Keys, *model.Masquerade or *model.FlannelNetwork, or nil where
	// nothing is to be kept. A Service is without endpoints at first, later the one that was
	// shown last.
	value any
	// trouble is nil where there is none.
	trouble *trouble
	file    *File
	// born is in microseconds since 1970; objects that do not say are the oldest.
	born int64
	line int32
	kind kind
	// shared says that the object was put: Snapshots may show parts of it.
	shared bool
	// dirty says that the Cluster will settle it before the next Snapshot.
	dirty bool
	// headless says of an EndpointSlice that only a headless Service may have it.
	headless bool
}

// trouble is what is wrong with an object.
type trouble struct {
	problems []model.Problem
	// faulty says that a part of the object cannot be used.
	faulty bool
	// nameless says that it has no usable name.
	nameless bool
}

// Key identifies the object.
func (o *Object) Key() Key { return Key{o.kind.String(), o.name} }

// Where is the place the object came from.
func (o *Object) Where() string { return o.file.Where(int(o.line)) }

// File is the file the object came from.
func (o *Object) File() *File { return o.file }

// Node is what a Node says; nil of another kind, and of one that cannot be understood.
func (o *Object) Node() *model.Node {
	n, _ := o.value.(*model.Node)
	return n
}

// Problems are the object's own faults and oddities.
func (o *Object) Problems() []model.Problem {
	if o.trouble == nil {
		return nil
	}
	return o.trouble.problems
}

// Named says whether the object has a usable name. One that has none cannot be
// told from others and is nothing to Put.
func (o *Object) Named() bool { return o.trouble == nil || !o.trouble.nameless }

func (o *Object) faulty() bool { return o.trouble != nil && o.trouble.faulty }

// same says whether putting p after o changes anything.
func (o *Object) same(p *Object) bool {
	return o.line == p.line && o.file.name == p.file.name && o.headless == p.headless && o.faulty() == p.faulty() && o.born == p.born &&
		slices.Equal(o.Problems(), p.Problems()) && sameValue(o.value, p.value)
}

// sameValue compares what objects say; what other objects add to it is not theirs.
func sameValue(a, b any) bool {
	switch a := a.(type) {
	case *model.Service:
		b, ok := b.(*model.Service)
		return ok && reflect.DeepEqual(join(a, nil), join(b, nil))
	case *slice:
		b, ok := b.(*slice)
		return ok && a.service == b.service && a.more == b.more && slices.Equal(a.ports, b.ports) && slices.Equal(a.endpoints, b.endpoints) && maps.Equal(a.hostnames, b.hostnames)
	}
	return reflect.DeepEqual(a, b)
}

// older orders objects by who may keep an address that both claim.
func (o *Object) older(p *Object) int {
	return cmp.Or(cmp.Compare(o.born, p.born), o.Key().Compare(p.Key()))
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

// Read checks obj, which is a pointer to one of the types named in Kind, and
// turns it into plain values. It returns an error for another type; whatever is
// wrong inside obj is in Object.Problems.
func Read(place Place, obj runtime.Object) (*Object, error) {
	kind := kindOf(obj)
	if kind == kindNone {
		return nil, fmt.Errorf("read %T: this kind is not read", obj)
	}
	meta := obj.(metav1.Object)
	r := &reader{place: place, object: &Object{
		name: KeyOf(kind.String(), meta.GetNamespace(), meta.GetName()).Name,
		kind: kind,
		file: place.File,
		line: int32(place.line("")),
		born: meta.GetCreationTimestamp().UnixMicro(),
	}}
	if r.nameable() {
		r.object.value = r.value(obj)
	} else {
		r.object.trouble.nameless = true
	}
	return r.object, nil
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
		if s := r.service(obj); s != nil {
			return s
		}
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
	case *corev1.ConfigMap:
		switch r.object.name {
		case corefile.ConfigMap, corefile.Custom:
			return keysOf(obj)
		case MasqueradeConfigMap:
			if m := r.masquerade(obj.Data); m != nil {
				return m
			}
		case FlannelConfigMaps[0], FlannelConfigMaps[1]:
			if n := r.flannelNetwork(obj.Data); n != nil {
				return n
			}
		}
	case *appsv1.Deployment:
		w := r.workload(obj)
		if r.object.name == corefile.Deployment {
			return &dnsServers{w, containerOf(obj)}
		}
		return w
	default:
		if w := r.workload(obj); w != nil {
			return w
		}
	}
	return nil
}

// fault reports a part of the object that cannot be used.
func (r *reader) fault(field, format string, args ...any) {
	r.advise(field, format, args...)
	r.object.trouble.faulty = true
}

// advise reports something that is likely a mistake but can be used.
func (r *reader) advise(field, format string, args ...any) {
	if r.object.trouble == nil {
		r.object.trouble = &trouble{}
	}
	r.object.trouble.problems = append(r.object.trouble.problems, model.Problem{
		Where: r.place.File.Where(r.place.line(field)), Object: r.object.Key().String(), Field: field, Text: fmt.Sprintf(format, args...),
	})
}

// nameable checks the object's names; without them nothing can refer to it. Names
// end up in file and cgroup names, so that nothing else may be let through.
func (r *reader) nameable() bool {
	k := r.object.Key()
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
