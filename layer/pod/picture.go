package pod

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/pod/pool"
	"github.com/millrace/millrace/model"
)

// Picture is the state of the layer. It implements layer.Picture.
type Picture struct {
	// ranges are those that pods' addresses are given of.
	ranges []netip.Prefix
	// node are the node's addresses as the cluster knows them; in wanted pictures.
	node []netip.Addr
	// pods are those that were given a network; in pictures of the kernel.
	pods []*Pod
	// services are the cluster's; in wanted pictures.
	services []*model.Service
	// others are the ranges of other nodes; in wanted pictures.
	others []netip.Prefix
	// facts are what the kernel said of the node.
	facts facts
	// files are those there that runtimes read, and whether each is as it is to be; install
	// are those to be there, in their order, in wanted pictures.
	files   map[installed]bool
	install []installed
	// sights are what there is of shortcuts.
	sights sights
}

// Pod is one network interface of a pod. It implements layer.Subject.
type Pod struct {
	pool.Lease
	// Device is the node's end of it, and Index its number, 0 where it has gone.
	Device string `json:"device"`
	Index  int    `json:"-"`
	// Way is how packets of other pods of the node come to it, by the words of enum
	// crossing: "direct", "device" or "stack"; in what Look returns.
	Way string `json:"way,omitempty"`
	// state says what is to be done about it, unless busy: somebody works on it, and nothing
	// is missing that he does not know of.
	state state
	busy  bool
	// mtu is the device's, in bytes; inside is what is in the pod's namespace, nothing if
	// that could not be seen.
	mtu    int
	inside lengths
}

type state byte

const (
	whole state = iota
	// torn lacks a route or a neighbour.
	torn
	// gone has no device any more.
	gone
	// unknown has a device, and is not written down.
	unknown
)

// Object implements layer.Subject.
func (p *Pod) Object() string {
	if p.Pod == "" {
		return p.Key.String()
	}
	return "pod " + p.Pod
}

// Detail implements layer.Subject.
func (p *Pod) Detail() string {
	var words []string
	for _, addr := range p.Addresses {
		words = append(words, addr.String())
	}
	return "at " + p.Device + ", " + strings.Join(words, ", ")
}

// podRange is a range of addresses for pods. It implements layer.Subject.
type podRange netip.Prefix

// Object implements layer.Subject.
func (r podRange) Object() string { return "range " + netip.Prefix(r).String() }

// Detail implements layer.Subject.
func (r podRange) Detail() string { return "for pods" }

// MarshalText gives the range.
func (r podRange) MarshalText() ([]byte, error) { return netip.Prefix(r).MarshalText() }

// Len implements layer.Picture.
func (p *Picture) Len() int { return len(p.ranges) + len(p.pods) }

// Subjects implements layer.Picture: the ranges, then the pods by their names.
func (p *Picture) Subjects() (all []layer.Subject) {
	for _, r := range p.ranges {
		all = append(all, podRange(r))
	}
	pods := slices.Clone(p.pods)
	slices.SortStableFunc(pods, func(a, b *Pod) int { return strings.Compare(a.Object(), b.Object()) })
	for _, one := range pods {
		all = append(all, one)
	}
	return all
}

// Pods are those that were given a network, in the order of their names.
func (p *Picture) Pods() (all []*Pod) {
	for _, subject := range p.Subjects() {
		if pod, ok := subject.(*Pod); ok {
			all = append(all, pod)
		}
	}
	return all
}

// note puts a change that was made into a picture.
func (p *Picture) note(change layer.Change) {
	switch s := change.Subject.(type) {
	case podRange:
		r := netip.Prefix(s)
		p.ranges = slices.DeleteFunc(p.ranges, func(have netip.Prefix) bool { return have == r })
		if change.Op != layer.Remove {
			p.ranges = append(p.ranges, r)
		}
	case *Pod:
		if change.Op == layer.Remove {
			p.pods = slices.DeleteFunc(p.pods, func(have *Pod) bool { return have.Key == s.Key })
			for _, addr := range s.Addresses {
				delete(p.sights.homes, addr)
			}
			return
		}
		for i, have := range p.pods {
			if have.Key == s.Key {
				mended := *s
				mended.state = whole
				p.pods[i] = &mended
			}
		}
	case *correction:
		s.pod.inside = s.to
	case *shortcut:
		for addr, home := range s.homes {
			p.sights.homes[addr] = home
		}
		p.sights.attached[s.pod.Index] = s.attached
	case nowhere:
		delete(p.sights.homes, netip.Addr(s))
	case gate:
		p.sights.open = change.Op != layer.Remove
	case installed:
		p.files[s] = true
	case lost:
		p.sights.lost = slices.DeleteFunc(p.sights.lost, func(have lost) bool { return have == s })
	}
}
