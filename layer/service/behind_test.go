package service

import (
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/model"
)

func (s *street) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// comes puts a program of somebody else behind those that are there.
func (s *street) comes(at attach.Cgroup) ebpf.ProgramID {
	s.t.Helper()
	theirs, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: at.Attach, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	s.must(err)
	s.t.Cleanup(func() { theirs.Close() })
	made, err := link.AttachCgroup(link.CgroupOptions{Path: at.Path, Attach: at.Attach, Program: theirs})
	s.must(err)
	s.t.Cleanup(func() { made.Close() })
	info, err := made.Info()
	s.must(err)
	return info.Program
}

// Somebody who has to see a call before the Service's address is translated comes later: the
// program goes behind theirs, when it is opened or later, and no call is without one
// meanwhile.
func TestProgramsGoBehindWhoHasToBeFirst(t *testing.T) {
	web := &model.Snapshot{Complete: true, Services: []*model.Service{serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "127.0.0.1")}}
	s := newStreet(t, web)
	serve(t, s.Bed, "tcp", "127.0.0.1:8080")
	calling, stop := sync.WaitGroup{}, make(chan struct{})
	calling.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, _, err := ask(s.Bed, "tcp4", "10.96.0.1:80"); err != nil {
				t.Errorf("a call meanwhile: %v", err)
				return
			}
		}
	})
	at := attach.Cgroup{Path: s.Cgroup, Attach: ebpf.AttachCGroupInet4Connect}
	first := s.comes(at)
	isBehind := func(what string) {
		t.Helper()
		all, err := at.Before(0)
		s.must(err)
		if slices.Index(all, first) != len(all)-2 {
			t.Errorf("%s: the programs are %v, and ours not the last behind %d", what, all, first)
		}
		pinned, err := at.Open(filepath.Join(s.layer.settings.Pins, "link_connect4"))
		s.must(err)
		defer pinned.Close()
		if pinned.Program() != all[len(all)-1] || !pinned.Alive() {
			t.Errorf("%s: the pin leads to program %d, alive %v; there are %v", what, pinned.Program(), pinned.Alive(), all)
		}
		if _, peer, err := ask(s.Bed, "tcp4", "10.96.0.1:80"); err != nil || peer != "10.96.0.1:80" {
			t.Errorf("%s: the peer is %s, %v", what, peer, err)
		}
	}
	s.must(s.layer.Close())
	s.layer.settings.Behind = func(call ebpf.AttachType) ebpf.ProgramID {
		if call == at.Attach {
			return first
		}
		return 0
	}
	s.must(s.layer.Open())
	isBehind("they are there when it is opened")

	first = s.comes(at)
	have, err := s.layer.Read()
	s.must(err)
	changes := s.layer.Diff(have, s.layer.Plan(web), true)
	if len(changes) != 1 || changes[0].String() != "+ place of program connect4 (was taken away)" {
		t.Fatalf("to do is %v", changes)
	}
	_, _, err = s.layer.Apply(have, s.layer.Plan(web), changes)
	s.must(err)
	isBehind("they came later")
	close(stop)
	calling.Wait()
	if s.have, err = s.layer.Read(); err != nil || len(s.layer.Diff(s.have, s.layer.Plan(web), true)) > 0 {
		t.Errorf("afterwards to do is %v, %v", s.layer.Diff(s.have, s.layer.Plan(web), true), err)
	}
}
