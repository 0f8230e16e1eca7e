package pod

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
)

// A pod begins, talks to another one, to the node and from there, and ends; all by the
// socket.
func TestAPodBeginsAndEnds(t *testing.T) {
	b := newTown(t)
	before := b.observe()
	l := b.open("10.244.1.0/24", "fd00:1::/64")
	empty := b.observe()
	defer watching(l)()
	ask := func(r *cni.Request) (err error) {
		_, err = cni.Ask(t.Context(), b.settings.Socket, r, 0)
		return err
	}
	for _, container := range []string{"web", "db"} {
		b.space(container)
	}
	web, err := cni.Ask(t.Context(), b.settings.Socket, b.request(cni.Add, "web", ""), 0)
	must(t, err)
	if got := addressesIn(web); !slices.Equal(got, []netip.Addr{netip.MustParseAddr("10.244.1.1"), netip.MustParseAddr("fd00:1::1")}) {
		t.Errorf("the first pod has %v", got)
	}
	if web.Interfaces[1].Name != "eth0" || web.Interfaces[1].Sandbox != b.pods["web"] || web.Interfaces[1].Mtu != 1400 || len(web.Routes) != 2 {
		t.Errorf("%+v %+v", web.Interfaces[1], web.Routes)
	}
	again, err := cni.Ask(t.Context(), b.settings.Socket, b.request(cni.Add, "web", ""), 0)
	if one, two := asJSON(t, web), asJSON(t, again); err != nil || one != two {
		t.Errorf("asked twice:\n%s\n%s, %v", one, two, err)
	}
	db := b.add(l, "db")
	for i, addr := range db {
		if seen, err := say(b.pods["web"], b.pods["db"], addr); err != nil || seen != addressesIn(web)[i] {
			t.Errorf("from pod to pod at %s: seen is %v, %v", addr, seen, err)
		}
		if seen, err := say(b.NetNS, b.pods["db"], addr); err != nil || seen != []netip.Addr{node4, node6}[i] {
			t.Errorf("from the node to the pod at %s: seen is %v, %v", addr, seen, err)
		}
		if seen, err := say(b.pods["db"], b.NetNS, []netip.Addr{node4, node6}[i]); err != nil || seen != addr {
			t.Errorf("from the pod to the node: seen is %v, %v", seen, err)
		}
	}
	must(t, ask(b.request(cni.Status, "", "")))
	must(t, ask(b.request(cni.Check, "db", "")))
	b.apply(l, "10.244.1.0/24", "fd00:1::/64") // shortcuts
	if changes := b.apply(l, "10.244.1.0/24", "fd00:1::/64"); len(changes) > 0 {
		t.Errorf("there is nothing to do, but\n%v", changes)
	}
	for _, container := range []string{"web", "db", "db", "never"} {
		must(t, ask(b.request(cni.Del, container, "")))
	}
	if after := b.observe(); after != empty {
		t.Errorf("before the pods:\n%s\nafter them:\n%s", empty, after)
	}
	if got := b.add(l, "web"); got[0] != netip.MustParseAddr("10.244.1.3") {
		t.Errorf("the next pod has %v: an address that was just given back", got)
	}
	must(t, ask(b.request(cni.Del, "web", "")))
	d, err := l.Describe()
	must(t, err)
	if d.Reasons["add"] != 4 || d.Reasons["del"] != 5 || d.Settings["mtu"] != "1400" || attach.HaveTCX() && len(d.Degraded) > 0 {
		t.Errorf("%+v", d)
	}
	must(t, l.Close())
	_, err = New(b.settings).Remove()
	must(t, err)
	if after := b.observe(); after != before {
		t.Errorf("at first:\n%s\nat last:\n%s", before, after)
	}
}

func asJSON(t *testing.T, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	must(t, err)
	return string(text)
}

// CHECK and the agent see what somebody took away; the agent puts back what is the node's.
func TestWhatIsMissing(t *testing.T) {
	b := newTown(t)
	ranges := []string{"10.244.1.0/24", "fd00:1::/64"}
	l := b.open(ranges...)
	b.space("web")
	addresses := b.add(l, "web")
	b.apply(l, ranges...)
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	routes, err := n.Routes(routeProtocol)
	must(t, err)
	must(t, n.DeleteRoute(routes[0]))
	_, err = l.Answer(t.Context(), b.request(cni.Check, "web", ""))
	if err == nil || !strings.Contains(err.Error(), "route to 10.244.1.1 by mr") {
		t.Errorf("CHECK says %v", err)
	}
	if changes := b.apply(l, ranges...); len(changes) != 1 || !strings.HasPrefix(changes[0].String(), "~ pod shop/web at mr") {
		t.Errorf("the changes are\n%v", changes)
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.Check, "web", ""))))
	other := `,"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"interface":0,"address":"10.244.1.77/32"}]}`
	if err := second(l.Answer(t.Context(), b.request(cni.Check, "web", other))); err == nil || !strings.Contains(err.Error(), "address 10.244.1.77, which is in prevResult") {
		t.Errorf("CHECK says %v", err)
	}
	same := fmt.Sprintf(`,"prevResult":{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"version":"4","interface":0,"address":"%s/32"}]}`, addresses[0])
	r := b.request(cni.Check, "web", same)
	r.Config = bytes.Replace(r.Config, []byte("1.1.0"), []byte("0.4.0"), 1)
	must(t, second(l.Answer(t.Context(), r)))
	// The pod's namespace goes without a word, as when a machine is about to run out of memory.
	must(t, netns.Do(b.pods["web"], func() error {
		inner, err := link.Open("")
		if err == nil {
			defer inner.Close()
			err = inner.Delete("eth0")
		}
		return err
	}))
	if changes := b.apply(l, ranges...); len(changes) != 1 || !strings.HasPrefix(changes[0].String(), "- pod shop/web") {
		t.Errorf("the changes are\n%v", changes)
	}
	if got := code(t, second(l.Answer(t.Context(), b.request(cni.Check, "web", "")))); got != types.ErrUnknownContainer {
		t.Errorf("CHECK of a pod that nobody knows: code %d", got)
	}
}

// An agent that dies between a pod's default routes of the two families leaves what the
// node's side of looks whole: the same ADD, which comes again, makes the rest.
func TestAHalfOfTheDefaultRoutes(t *testing.T) {
	b := newTown(t)
	ranges := []string{"10.244.1.0/24", "fd00:1::/64"}
	l := b.open(ranges...)
	b.space("web")
	b.add(l, "web")
	b.apply(l, ranges...)
	must(t, netns.Do(b.pods["web"], func() error {
		inner, err := link.Open("")
		if err != nil {
			return err
		}
		defer inner.Close()
		index, err := inner.Index("eth0")
		if err != nil {
			return err
		}
		return inner.DeleteRoute(link.Route{To: netip.MustParsePrefix("::/0"), Via: gateway6, Link: index})
	}))
	if err := second(l.Answer(t.Context(), b.request(cni.Check, "web", ""))); err == nil || !strings.Contains(err.Error(), "a default route of the pod by eth0 from fd00:1::") {
		t.Errorf("CHECK says %v", err)
	}
	b.add(l, "web")
	must(t, second(l.Answer(t.Context(), b.request(cni.Check, "web", ""))))
}

func second[T any](_ T, err error) error { return err }

// Each error has its code, and says what to do.
func TestErrors(t *testing.T) {
	b := newTown(t)
	l := b.open()
	b.space("web")
	for _, row := range []struct {
		command, extra string
		before         func()
		code           uint
		says           string
	}{
		{cni.Status, "", nil, types.ErrPluginNotAvailable, "--allocate-node-cidrs"},
		{cni.Add, "", nil, types.ErrTryAgainLater, "node n1 has no ranges for pods"},
		{cni.Status, "", func() { b.apply(l, "10.244.1.0/31") }, 0, ""},
		{cni.Status, "", func() { must(t, b.Inside(func() error { return netns.SetSysctl("net.ipv4.ip_forward", "0") })) }, types.ErrLimitedConnectivity, "sysctl -w net.ipv4.ip_forward=1"},
		{cni.Status, "", func() { must(t, b.Inside(func() error { return netns.SetSysctl("net.ipv4.ip_forward", "1") })) }, 0, ""},
		{cni.Add, `,"prevResult":{}`, nil, types.ErrInvalidNetworkConfig, "first plugin"},
		{"NONSENSE", "", nil, types.ErrInvalidEnvironmentVariables, `unknown command "NONSENSE"`},
		{cni.Add, "", nil, 0, ""},
	} {
		if row.before != nil {
			row.before()
		}
		err := second(l.Answer(t.Context(), b.request(row.command, "web", row.extra)))
		if code(t, err) != row.code || err != nil && !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v, code %d, not %d with %q", row.command, err, code(t, err), row.code, row.says)
		}
	}
	b.space("two")
	b.add(l, "two")
	b.space("third")
	if err := second(l.Answer(t.Context(), b.request(cni.Add, "third", ""))); code(t, err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), "all addresses are in use of 10.244.1.0/31") {
		t.Errorf("a pod too many: %v", err)
	}
	if err := second(l.Answer(t.Context(), b.request(cni.Status, "", ""))); code(t, err) != types.ErrPluginNotAvailable {
		t.Errorf("status where all is given: %v", err)
	}
	r := b.request(cni.Add, "web", "")
	r.Namespace = nil
	if err := second(l.Answer(t.Context(), r)); code(t, err) != types.ErrInvalidNetNS {
		t.Error(err)
	}
}

// What is not ours in a pod is left, and nothing stays of what was begun.
func TestAnInterfaceIsThereAlready(t *testing.T) {
	b := newTown(t)
	l := b.open("10.244.1.0/24")
	space := b.space("web")
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	must(t, second(n.Veth(link.Veth{Name: "others", Peer: "eth0", PeerNamespace: space})))
	before := b.observe()
	err = second(l.Answer(t.Context(), b.request(cni.Add, "web", "")))
	if err == nil || !strings.Contains(err.Error(), "give pod shop/web its network: the pod has an interface eth0 already") {
		t.Error(err)
	}
	if after := b.observe(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	must(t, second(n.Index("others")))
}

// The runtime says which containers there are; the others' networks go. Networks of other
// names are not its to say.
func TestGC(t *testing.T) {
	b := newTown(t)
	l := b.open("10.244.1.0/24")
	for _, container := range []string{"a", "b", "c", "d"} {
		b.space(container)
	}
	for _, container := range []string{"a", "b", "c"} {
		b.add(l, container)
	}
	other := b.request(cni.Add, "d", "")
	other.Config = []byte(`{"cniVersion":"1.1.0","name":"other","type":"millrace"}`)
	must(t, second(l.Answer(t.Context(), other)))
	must(t, second(l.Answer(t.Context(), b.request(cni.GC, "", `,"cni.dev/valid-attachments":[{"containerID":"b","ifname":"eth0"},{"containerID":"c","ifname":"net1"}]`))))
	if got := containers(l); got != "b d" {
		t.Errorf("left are %s, not b d", got)
	}
	b.apply(l, "10.244.1.0/24") // shortcuts
	if changes := b.apply(l, "10.244.1.0/24"); len(changes) > 0 {
		t.Errorf("to do is\n%v", changes)
	}
}

func containers(l *Layer) string {
	var words []string
	for _, lease := range l.pool.Leases() {
		words = append(words, lease.Container)
	}
	return strings.Join(words, " ")
}

// Where the file is lost or cannot be read, the devices say whose they are: no pod loses
// its network, and no address is given twice.
func TestTheFileIsLost(t *testing.T) {
	b := newTown(t)
	ranges := []string{"10.244.1.0/24", "fd00:1::/64"}
	l := b.open(ranges...)
	b.space("web")
	addresses := b.add(l, "web")
	b.apply(l, ranges...)
	for _, text := range []string{"", `{"format":1,"leases":[{]`} {
		must(t, l.Close())
		file := filepath.Join(b.settings.Folder, "addresses.json")
		must(t, os.Remove(file))
		if text != "" {
			must(t, os.WriteFile(file, []byte(text), 0o600))
		}
		l = New(b.settings)
		must(t, l.Open())
		defer l.Close()
		if changes := b.apply(l, ranges...); len(changes) != 3 || !strings.HasPrefix(changes[2].String(), "+ pod shop/web at mr") {
			t.Errorf("the changes are\n%v", changes)
		}
		d, err := l.Describe()
		must(t, err)
		if said := strings.Join(d.Degraded, ""); strings.Contains(said, "found out from the node's devices") != (text != "") {
			t.Errorf("with the file %q it says %q", text, said)
		}
		if again := b.add(l, "web"); !slices.Equal(again, addresses) {
			t.Errorf("the pod has %v, not %v", again, addresses)
		}
		must(t, second(l.Answer(t.Context(), b.request(cni.Check, "web", ""))))
	}
	if err := os.Remove(filepath.Join(b.settings.Folder, "addresses.json.unreadable")); err != nil {
		t.Error(err)
	}
}

// A machine that starts again has the file and none of the pods.
func TestReboot(t *testing.T) {
	b := newTown(t)
	l := b.open("10.244.1.0/24")
	for i := range 5 {
		b.space(fmt.Sprint("c", i))
		b.add(l, fmt.Sprint("c", i))
	}
	must(t, l.Close())
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	for i := range 5 {
		must(t, n.Delete(deviceName(pool.Key{Container: fmt.Sprint("c", i), Interface: "eth0"})))
	}
	l = New(b.settings)
	must(t, l.Open())
	defer l.Close()
	if changes := b.apply(l, "10.244.1.0/24"); len(changes) != 5 {
		t.Errorf("the changes are\n%v", changes)
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.Del, "c1", ""))))
	b.space("new")
	if got := b.add(l, "new"); got[0] != netip.MustParseAddr("10.244.1.6") {
		t.Errorf("the first pod after it has %v: others may still send there", got)
	}
}

// Runtimes that ask for one interface many times at once, and give up, and ask again, while
// the agent looks: at the end nothing is there twice, and nothing is left.
func TestOneInterfaceAtOnce(t *testing.T) {
	b := newTown(t)
	ranges := []string{"10.244.1.0/24", "fd00:1::/64"}
	l := b.open(ranges...)
	b.space("web")
	empty := b.observe()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			have, err := l.Read()
			if err == nil {
				want := l.Plan(cluster(ranges...))
				_, _, err = l.Apply(have, want, l.Diff(have, want, true))
			}
			if err != nil {
				t.Error(err)
			}
		}
	}()
	var all sync.WaitGroup
	for i := range 6 {
		requests := []*cni.Request{b.request(cni.Add, "web", ""), b.request(cni.Del, "web", "")}
		all.Go(func() {
			for j := range 12 {
				if err := second(l.Answer(t.Context(), requests[(i+j)%2])); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	addresses := b.add(l, "web")
	close(stop)
	<-done
	b.apply(l, ranges...)
	must(t, second(l.Answer(t.Context(), b.request(cni.Check, "web", ""))))
	if _, err := say(b.NetNS, b.pods["web"], addresses[0]); err != nil {
		t.Error(err)
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.Del, "web", ""))))
	if changes := b.apply(l, ranges...); len(changes) > 0 {
		t.Errorf("to do is\n%v", changes)
	}
	if after := b.observe(); after != empty {
		t.Errorf("before:\n%s\nafter:\n%s", empty, after)
	}
}

// held is a host that has removed a device, and says so only when it may.
type held struct {
	host
	removed, may chan struct{}
}

func (h held) demolish(device string) error {
	err := h.host.demolish(device)
	close(h.removed)
	<-h.may
	return err
}

// While somebody works on an interface there is nothing to be done about it, and nothing to
// be counted as drift: what is missing, he knows of. When he is done it is looked at again.
func TestAnInterfaceThatSomebodyWorksOn(t *testing.T) {
	b := newTown(t)
	ranges := []string{"10.244.1.0/24", "fd00:1::/64"}
	l := b.open(ranges...)
	b.space("web")
	b.add(l, "web")
	b.apply(l, ranges...)
	told := make(chan struct{}, 100)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	h := held{l.host, make(chan struct{}), make(chan struct{})}
	l.host = h
	ended := make(chan error, 1)
	request := b.request(cni.Del, "web", "")
	go func() { ended <- second(l.Answer(ctx, request)) }()
	<-h.removed
	have, err := l.Read()
	must(t, err)
	if changes := l.Diff(have, l.Plan(cluster(ranges...)), true); len(changes) > 0 {
		t.Errorf("while the pod ends, to do is\n%v", changes)
	}
	<-l.done // of what was before
	go l.tell(ctx, func() { told <- struct{}{} })
	select {
	case <-told:
		t.Error("it is looked at before it is done")
	case <-time.After(20 * time.Millisecond):
	}
	close(h.may)
	must(t, <-ended)
	select {
	case <-told:
	case <-time.After(10 * time.Second):
		t.Error("nobody looks at an interface after it was worked on")
	}
	if changes := b.apply(l, ranges...); len(changes) > 0 {
		t.Errorf("after the pod has ended, to do is\n%v", changes)
	}
}

// The plugin waits for an agent that is being upgraded, and says so where there is none.
func TestNoAgent(t *testing.T) {
	b := newTown(t)
	b.space("web")
	for command, want := range map[string]uint{cni.Add: types.ErrTryAgainLater, cni.Del: types.ErrTryAgainLater, cni.Status: types.ErrPluginNotAvailable} {
		_, err := cni.Ask(t.Context(), b.settings.Socket, b.request(command, "web", ""), 100*time.Millisecond)
		if code(t, err) != want || !strings.Contains(err.Error(), "agent of this node does not answer") || !strings.Contains(err.Error(), b.settings.Socket) {
			t.Errorf("%s: %v, code %d", command, err, code(t, err))
		}
	}
	came := make(chan error, 1)
	r := b.request(cni.Add, "web", "")
	go func() {
		_, err := cni.Ask(t.Context(), b.settings.Socket, r, 20*time.Second)
		came <- err
	}()
	l := b.open("10.244.1.0/24")
	defer watching(l)()
	if err := <-came; err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(b.settings.Socket); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := New(b.settings).Remove(); err == nil || !errors.Is(err, layer.ErrInUse) {
		t.Error(err)
	}
}
