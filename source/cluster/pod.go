package cluster

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/model"
)

// pod reads a Pod; nil for one that is not there on the network: it has ended
// (its addresses may be another's by now), or its owner has yet to make it.
func (r *reader) pod(obj *corev1.Pod) *model.Pod {
	if obj.Status.Phase == corev1.PodSucceeded || obj.Status.Phase == corev1.PodFailed {
		return nil
	}
	p := r.podLike("", &obj.ObjectMeta, &obj.Spec)
	p.Name = r.object.name
	p.Node = obj.Spec.NodeName
	for _, c := range obj.Status.Conditions {
		if c.Type == corev1.PodReady {
			p.Ready = c.Status == corev1.ConditionTrue
		}
	}
	if len(obj.Status.PodIPs) == 0 && obj.Status.PodIP != "" {
		if addr, ok := r.address("status.podIP", obj.Status.PodIP); ok {
			p.Addresses = append(p.Addresses, addr)
		}
	}
	for i, ip := range obj.Status.PodIPs {
		addr, ok := r.address(fmt.Sprintf("status.podIPs[%d].ip", i), ip.IP)
		if ok && !slices.Contains(p.Addresses, addr) {
			p.Addresses = append(p.Addresses, addr)
		}
	}
	if metav1.GetControllerOf(obj) != nil && len(p.Addresses) == 0 {
		return nil
	}
	return &p
}

// podLike reads what a Pod and a pod template have in common.
func (r *reader) podLike(prefix string, meta *metav1.ObjectMeta, spec *corev1.PodSpec) model.Pod {
	p := model.Pod{
		Labels:      copied(meta.Labels),
		Annotations: annotations(meta.Annotations),
		HostNetwork: spec.HostNetwork,
		Where:       r.object.Where(),
	}
	for i := range spec.InitContainers {
		// An init container that restarts always is a sidecar and goes on to run.
		c := &spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			r.containerPorts(&p, fmt.Sprintf("%sspec.initContainers[%d]", prefix, i), c.Ports)
		}
	}
	for i := range spec.Containers {
		r.containerPorts(&p, fmt.Sprintf("%sspec.containers[%d]", prefix, i), spec.Containers[i].Ports)
	}
	return p
}

// containerPorts adds a container's ports. Two names for one number are in order.
func (r *reader) containerPorts(p *model.Pod, field string, from []corev1.ContainerPort) {
	for i, port := range from {
		at := fmt.Sprintf("%s.ports[%d]", field, i)
		protocol, okProtocol := r.protocol(at+".protocol", string(port.Protocol))
		number, okPort := r.port(at+".containerPort", port.ContainerPort)
		c := model.ContainerPort{Name: port.Name, Protocol: protocol, Port: number}
		if okProtocol && okPort && !slices.Contains(p.Ports, c) {
			p.Ports = append(p.Ports, c)
		}
	}
}
