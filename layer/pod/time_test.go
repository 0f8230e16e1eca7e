package pod

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/layer/pod/cni"
)

// What the agent takes of an ADD and a DEL on a node with 110 pods, as many as Kubernetes
// plans for.
func TestWhatAnAddTakes(t *testing.T) {
	b := newTown(t)
	l := b.open("10.244.1.0/24", "fd00:1::/64")
	const there, times = 110, 40
	for i := range there {
		container := fmt.Sprint("c", i)
		b.space(container)
		b.add(l, container)
	}
	b.space("web")
	var adds, dels []time.Duration
	for range times {
		add, del := b.request(cni.Add, "web", ""), b.request(cni.Del, "web", "")
		begun := time.Now()
		must(t, second(l.Answer(t.Context(), add)))
		added := time.Now()
		must(t, second(l.Answer(t.Context(), del)))
		adds, dels = append(adds, added.Sub(begun)), append(dels, time.Since(added))
	}
	slices.Sort(adds)
	slices.Sort(dels)
	t.Logf("of %d: ADD p50 %v, the longest %v; DEL p50 %v, the longest %v", times, adds[times/2], adds[times-1], dels[times/2], dels[times-1])
	if most := 250 * time.Millisecond; adds[times/2] > most { // a busy machine takes its time
		t.Errorf("half of the ADDs take more than %v", most)
	}
}

// Pods that begin while many others end do not wait for all of these.
func TestAnAddAmongManyDels(t *testing.T) {
	b := newTown(t)
	l := b.open("10.244.1.0/24", "fd00:1::/64")
	const ending = 60
	var dels []*cni.Request
	for i := range ending {
		container := fmt.Sprint("c", i)
		b.space(container)
		b.add(l, container)
		dels = append(dels, b.request(cni.Del, container, ""))
	}
	b.space("web")
	add := b.request(cni.Add, "web", "")
	begun := time.Now()
	var all sync.WaitGroup
	for _, del := range dels {
		all.Go(func() {
			if err := second(l.Answer(t.Context(), del)); err != nil {
				t.Error(err)
			}
		})
	}
	must(t, second(l.Answer(t.Context(), add)))
	added := time.Since(begun)
	all.Wait()
	ended := time.Since(begun)
	t.Logf("%d pods ended in %v; the one that began meanwhile took %v", ending, ended, added)
	if added > ended/2 {
		t.Errorf("a pod that began took %v of the %v in which %d ended", added, ended, ending)
	}
}

// What a request and its answer take from pod to pod, by shortcuts and by the stack, in
// turns.
func TestWhatAShortcutSaves(t *testing.T) {
	h := newHamlet(t)
	h.bring()
	const rounds, requests = 9, 1500
	listener, err := listening(h.pods["db"], h.addresses[0])
	must(t, err)
	defer unix.Close(listener.fd)
	go listener.echo(requests * (2*rounds + 1))
	speaker, err := speaking(h.pods["web"], listener.at)
	must(t, err)
	defer unix.Close(speaker)
	p50 := func(open bool) time.Duration {
		must(t, h.l.shortcuts.open(open))
		return median(t, speaker, requests)
	}
	p50(true)
	before := h.crossings()["direct"]
	var ratios []float64
	var direct, stack time.Duration
	for range rounds {
		direct, stack = p50(true), p50(false)
		ratios = append(ratios, float64(direct)/float64(stack))
	}
	slices.Sort(ratios)
	t.Logf("p50 of %d requests: %v by shortcuts, %v by the stack (last of %d rounds); the ratio's median is %.2f, from %.2f to %.2f",
		requests, direct, stack, rounds, ratios[rounds/2], ratios[0], ratios[rounds-1])
	if n := h.crossings()["direct"] - before; n < 2*rounds*requests {
		t.Errorf("%d packets took shortcuts, of %d", n, 2*rounds*requests)
	}
	if ratios[rounds/2] > 1.25 {
		t.Error("shortcuts are slower than the stack, by more than a busy machine explains")
	}
}

// median is what half of so many requests take at most, with their answers.
func median(t *testing.T, speaker, requests int) time.Duration {
	t.Helper()
	took := make([]time.Duration, requests)
	text := make([]byte, 64)
	for i := range took {
		begun := time.Now()
		if _, err := unix.Write(speaker, text); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Read(speaker, text); err != nil || n != len(text) {
			t.Fatal(n, err)
		}
		took[i] = time.Since(begun)
	}
	slices.Sort(took)
	return took[requests/2]
}

// What a request and its answer take of a pod that is limited to 100 Mbit/s each way and
// does not use them, beside one without limits, in turns; and while the pod receives as
// much as it may.
func TestWhatALimitTakes(t *testing.T) {
	h := newHamlet(t)
	capped := h.addLimited(h.l, "capped", limited(100e6, 100e6))
	h.bring()
	const rounds, requests, late = 9, 1000, 40
	speakers := map[string]int{}
	for pod, at := range map[string]netip.Addr{"db": h.addresses[0], "capped": capped[0]} {
		listener, err := listening(h.pods[pod], at)
		must(t, err)
		defer unix.Close(listener.fd)
		go listener.echo(requests*rounds + late)
		speakers[pod], err = speaking(h.pods["web"], listener.at)
		must(t, err)
		defer unix.Close(speakers[pod])
	}
	var ratios []float64
	var free, idle time.Duration
	for range rounds {
		free, idle = median(t, speakers["db"], requests), median(t, speakers["capped"], requests)
		ratios = append(ratios, float64(idle)/float64(free))
	}
	slices.Sort(ratios)
	bulk := make(chan error, 1)
	go func() {
		_, err := layertest.Flow{From: h.pods["web"], To: h.pods["capped"], At: netip.AddrPortFrom(capped[0], 7000), Streams: 4, MTU: 1400}.Rate(2 * time.Second)
		bulk <- err
	}()
	time.Sleep(100 * time.Millisecond)
	full := median(t, speakers["capped"], late)
	must(t, <-bulk)
	t.Logf("p50 of %d requests: %v without limits, %v with (last of %d rounds); the ratio's median is %.2f, from %.2f to %.2f; %v while the pod receives all that it may",
		requests, free, idle, rounds, ratios[rounds/2], ratios[0], ratios[rounds-1], full)
	if ratios[rounds/2] > 2 {
		t.Error("a limit that is not used takes more than a busy machine explains")
	}
	if full > 200*time.Millisecond {
		t.Error("packets wait far longer than the queue is long")
	}
}

// listener is a socket that blocks its thread.
type listener struct {
	fd int
	at unix.Sockaddr
}

func listening(space string, addr netip.Addr) (l listener, err error) {
	err = netns.Do(space, func() error {
		if l.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		l.at = &unix.SockaddrInet4{Addr: addr.As4(), Port: 7777}
		return errors.Join(unix.Bind(l.fd, l.at), unix.Listen(l.fd, 1))
	})
	return l, err
}

// echo answers so many requests of one connection.
func (l listener) echo(requests int) {
	c, _, err := unix.Accept(l.fd)
	if err != nil {
		return
	}
	defer unix.Close(c)
	_ = unix.SetsockoptInt(c, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	text := make([]byte, 64)
	for range requests {
		n, err := unix.Read(c, text)
		if err != nil || n == 0 {
			return
		}
		if _, err := unix.Write(c, text[:n]); err != nil {
			return
		}
	}
}

func speaking(space string, to unix.Sockaddr) (fd int, err error) {
	err = netns.Do(space, func() error {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		return unix.Connect(fd, to)
	})
	return fd, err
}
