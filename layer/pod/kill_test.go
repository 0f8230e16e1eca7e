package pod

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
	"github.com/millrace/millrace/model"
)

// The test binary is an agent with this layer alone when this is set.
const asAgent = "MILLRACE_TEST_POD_AGENT"

var killRanges = []string{"10.244.0.0/21", "fd00:1::/64"}

func TestMain(m *testing.M) {
	if text := os.Getenv(asAgent); text != "" {
		if err := beAgent(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func beAgent(text string) error {
	var settings Settings
	if err := json.Unmarshal([]byte(text), &settings); err != nil {
		return err
	}
	l := New(settings)
	if err := l.Open(); err != nil {
		return err
	}
	bring := func() error {
		have, err := l.Read()
		if err != nil {
			return err
		}
		want := l.Plan(cluster(killRanges...))
		_, _, err = l.Apply(have, want, l.Diff(have, want, true))
		return err
	}
	if err := bring(); err != nil {
		return err
	}
	var failed atomic.Pointer[error]
	ctx, end := context.WithCancel(context.Background())
	err := l.Watch(ctx, func() {
		if err := bring(); err != nil {
			failed.Store(&err)
			end()
		}
		time.Sleep(5 * time.Millisecond)
	})
	if why := failed.Load(); why != nil {
		return *why
	}
	return err
}

// Pods begin and end while the agent is killed at random: nothing is left of those that
// ended, and the others have what they were told. MILLRACE_LONG=1: 500 of them.
func TestPodsWhileTheAgentIsKilled(t *testing.T) {
	count := 60
	if os.Getenv("MILLRACE_LONG") != "" {
		count = 500
	}
	b := newTown(t)
	b.settings.Cooldown = time.Second
	b.open(killRanges...).Close()
	empty := b.observe()
	folder := filepath.Join(t.TempDir(), "spaces")
	t.Cleanup(func() {
		left, _ := os.ReadDir(folder)
		for _, space := range left {
			must(t, netns.Remove(filepath.Join(folder, space.Name())))
		}
	})
	killed, stop := b.keepKilling()
	var given sync.Map // container to what it was told
	places := make(chan struct{}, 8)
	var all sync.WaitGroup
	for i := range count {
		places <- struct{}{}
		all.Go(func() {
			defer func() { <-places }()
			container := fmt.Sprintf("c%03d", i)
			space := filepath.Join(folder, container)
			if err := netns.Create(space); err != nil {
				t.Error(err)
				return
			}
			result := insist(t, b.settings.Socket, cni.Add, container, space)
			if result == nil {
				return
			}
			given.Store(container, result)
			if i%2 == 0 { // every second one goes, half of these without their namespace
				given.Delete(container)
				if i%4 == 0 {
					must(t, netns.Remove(space))
				}
				insist(t, b.settings.Socket, cni.Del, container, space)
				_ = netns.Remove(space)
			}
		})
	}
	all.Wait()
	stop()
	l := b.open(killRanges...)
	held := map[netip.Addr]string{}
	given.Range(func(container, addresses any) bool {
		b.pods[container.(string)] = filepath.Join(folder, container.(string))
		if err := second(l.Answer(t.Context(), b.request(cni.Check, container.(string), ""))); err != nil {
			t.Error(err)
		}
		lease, _ := l.pool.Lease(pool.Key{Container: container.(string), Interface: "eth0"})
		if !slices.Equal(lease.Addresses, addresses.([]netip.Addr)) {
			t.Errorf("%s was told %v and has %v", container, addresses, lease.Addresses)
		}
		for _, addr := range lease.Addresses {
			if other := held[addr]; other != "" {
				t.Errorf("%s and %s have %s", container, other, addr)
			}
			held[addr] = container.(string)
		}
		return true
	})
	if n := len(l.pool.Leases()); n != count/2 || len(held) != 2*n {
		t.Errorf("%d pods are there, not %d", n, count/2)
	}
	b.talkAmong(held)
	t.Logf("%d pods, and the agent was killed %d times", count, killed.Load())
	if killed.Load() == 0 {
		t.Error("it was never killed: this shows nothing")
	}
	for _, lease := range l.pool.Leases() {
		must(t, second(l.Answer(t.Context(), b.request(cni.Del, lease.Container, ""))))
	}
	if after := b.observe(); after != empty {
		t.Errorf("before:\n%s\nafter:\n%s", empty, after)
	}
}

// talkAmong has some pods open connections to others.
func (b *town) talkAmong(held map[netip.Addr]string) {
	b.t.Helper()
	tries := 0
	for addr, container := range held {
		for _, from := range held {
			if from == container {
				continue
			}
			if _, err := say(b.pods[from], b.pods[container], addr); err != nil {
				b.t.Errorf("from %s to %s at %s: %v", from, container, addr, err)
			}
			break
		}
		if tries++; tries == 20 {
			return
		}
	}
}

// insist asks until it is done, as runtimes do.
func insist(t *testing.T, socket, command, container, space string) []netip.Addr {
	r := &cni.Request{Command: command, Container: container, Interface: "eth0", Space: space, Args: "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=" + container,
		Config: []byte(`{"cniVersion":"1.1.0","name":"town","type":"millrace"}`)}
	if file, err := os.Open(space); err == nil {
		defer file.Close()
		r.Namespace = file
	}
	for begun := time.Now(); ; {
		result, err := cni.Ask(t.Context(), socket, r, 20*time.Second)
		if err == nil && result != nil {
			return addressesIn(result)
		}
		if err == nil {
			return nil
		}
		if code(t, err) != types.ErrTryAgainLater || time.Since(begun) > time.Minute {
			t.Errorf("%s of %s: %v", command, container, err)
			return nil
		}
	}
}

// keepKilling has an agent run, kills it at random moments and starts the next one, until
// stop is called, which ends the last.
func (b *town) keepKilling() (killed *atomic.Int64, stop func()) {
	settings, err := json.Marshal(b.settings)
	must(b.t, err)
	killed = &atomic.Int64{}
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			agent := exec.Command(os.Args[0])
			agent.Env = append(os.Environ(), asAgent+"="+string(settings))
			var said strings.Builder
			agent.Stderr = &said
			if err := agent.Start(); err != nil {
				b.t.Error(err)
				return
			}
			ended := make(chan struct{})
			go func() { _ = agent.Wait(); close(ended) }()
			if rand.IntN(4) > 0 { // else it is killed while it starts
				b.answers(ended)
			}
			last := false
			select {
			case <-time.After(time.Duration(30+rand.IntN(200)) * time.Millisecond):
				killed.Add(1)
			case <-over:
				last = true
			case <-ended:
				b.t.Errorf("the agent ended by itself: %s", said.String())
				return
			}
			_ = agent.Process.Kill()
			<-ended
			if last {
				return
			}
		}
	}()
	return killed, func() { close(over); <-done }
}

// answers waits until an agent does, or has ended.
func (b *town) answers(ended chan struct{}) {
	for {
		status := &cni.Request{Command: cni.Status, Config: []byte(`{"name":"town"}`)}
		_, err := cni.Ask(context.Background(), b.settings.Socket, status, 0)
		if err == nil {
			return
		}
		select {
		case <-ended:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Whatever a runtime says, the agent answers.
func FuzzAnswer(f *testing.F) {
	f.Add("ADD", "c1", "eth0", []byte(`{"cniVersion":"1.1.0","name":"town"}`))
	f.Add("DEL", "", "", []byte(`{}`))
	f.Add("CHECK", "c1", "eth0", []byte(`{"cniVersion":"1.1.0","name":"town","prevResult":{"cniVersion":"1.1.0","ips":[null,{"interface":0,"address":"10.1.0.7/32"}],"interfaces":[null]}}`))
	f.Add("GC", "", "", []byte(`{"name":"town","cni.dev/valid-attachments":[null,{"containerID":"c1"}]}`))
	f.Add("STATUS", "", "", []byte(`7`))
	f.Add("ADD", "c2", "eth0", []byte(`{"name":"town","runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":8080,"protocol":"tcp","hostIP":"::ffff:192.0.2.1"},{"hostPort":53,"containerPort":1,"protocol":"UDP"}]}}`))
	space, err := os.Open("/proc/self/ns/net")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, command, container, name string, config []byte) {
		var told []model.HostPort
		l := New(Settings{Node: "n1", HostPorts: func(ports []model.HostPort) { told = ports }})
		l.host, l.save = nobody{}, func(pool.Book) error { return nil }
		l.pool.Use([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")})
		known := pool.Lease{Key: pool.Key{Container: "c1", Interface: "eth0"}, Network: "town", Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.7")}}
		must(t, l.pool.Adopt(known))
		result, err := l.Answer(t.Context(), &cni.Request{Command: command, Container: container, Interface: name, Config: config, Namespace: space})
		if (result != nil) != (err == nil && command == cni.Add) {
			t.Errorf("%s: %v, %v", command, result, err)
		}
		for i, port := range told {
			if port.At.Port() == 0 || port.To.Port() == 0 || !port.At.Addr().Is4() || i > 0 && port.Compare(told[i-1]) == 0 {
				t.Errorf("it tells of %v", told)
			}
		}
	})
}
