package agent

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// What dies is told by the pod, however many namespaces there are: those beyond a bound,
// and those of nobody, are one.
func TestDropsAreToldByPod(t *testing.T) {
	const extra = 40
	var pods []*model.Pod
	var found []netns.Space
	drops := []layer.Drops{{Space: 1, Reason: "NO_SOCKET", Count: 7}}
	for i := range podsMost + extra {
		addr := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
		pods = append(pods, &model.Pod{Name: model.Name{Namespace: "shop", Name: fmt.Sprintf("web-%d", i)}, Addresses: []netip.Addr{addr}})
		found = append(found, netns.Space{Inode: uint32(100 + i), Addresses: []netip.Addr{addr}})
		drops = append(drops, layer.Drops{Space: uint32(100 + i), Reason: "NO_SOCKET", Count: 2})
	}
	drops = append(drops, layer.Drops{Space: 99, Reason: "NO_SOCKET", Count: 1}) // of nobody
	s, searches := newSpaces(), 0
	s.own = func() uint32 { return 1 }
	s.search = func() ([]netns.Space, error) { searches++; return found, nil }
	for range 3 {
		labelled := s.label(drops, pods)
		counts := map[string]uint64{}
		for _, d := range labelled {
			if _, twice := counts[d.Pod]; twice {
				t.Errorf("%s is told twice", d.Pod)
			}
			counts[d.Pod] = d.Count
		}
		if len(labelled) != podsMost+2 || counts[""] != 7 || counts["shop/web-0"] != 2 || counts[othersPod] != 2*extra+1 {
			t.Errorf("%d rows, the node %d, a pod %d, others %d", len(labelled), counts[""], counts["shop/web-0"], counts[othersPod])
		}
	}
	if searches != 1 {
		t.Errorf("namespaces were looked for %d times at once", searches)
	}
	if namespace, name := podLabels("shop/web-0"); namespace != "shop" || name != "web-0" {
		t.Errorf("labels %q %q", namespace, name)
	}
}
