package main

import (
	"github.com/millrace/millrace/layer/pod"
	"github.com/millrace/millrace/model"
)

// hostPorts are those of the node's pods on their way from the pod layer, which knows them,
// to the agent, which puts them into Snapshots for the service layer. Only the newest count.
type hostPorts chan []model.HostPort

// tell is pod.Settings.HostPorts. It is not called by two at once.
func (h hostPorts) tell(ports []model.HostPort) {
	select {
	case <-h:
	default:
	}
	h <- ports
}

// servesHostPorts says that pods get their network here, and that the service layer serves
// what comes from other machines, which is most of what a hostPort is for.
func (p *place) servesHostPorts() bool { return p.pods && p.wire }

// addHostPorts puts into a Snapshot what pods have been given, for those who plan without
// the agent.
func (p *place) addHostPorts(s *model.Snapshot) error {
	if !p.servesHostPorts() {
		return nil
	}
	picture, err := p.network().Look()
	if err == nil {
		s.HostPorts = picture.(*pod.Picture).HostPorts()
	}
	return err
}
